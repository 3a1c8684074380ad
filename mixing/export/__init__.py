"""Write a method as one file that imports torch alone: python -m mixing.export NAME > file.py"""
