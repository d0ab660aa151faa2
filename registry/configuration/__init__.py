"""What gin text is made of: its files, values, secrets, paths and the code that it imports.

registry/gin_setup.py is the door to it; nothing here builds a part.
"""
