"""Images for training and evaluation at several sizes"""
