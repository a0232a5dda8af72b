"""Models from files of any kind, to folders and to the Hugging Face Hub"""
