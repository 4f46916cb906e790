"""Training experiments: what they ask, how they are run, and what may be said of them.

make experiments                       lists them, and how many runs are missing
make experiments NAME=fst_small        trains what is missing, and writes table and pictures
"""
