"""What a file of timm-rs export is made of, for those who write and those who read it"""

__all__ = ['INDEX']

INDEX = 'resolution_index'  # in the graph: int64 scalar, the row of the tables, 0 for the largest size
