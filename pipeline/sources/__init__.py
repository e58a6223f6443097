"""Where ratings come from: found, downloaded or generated.

config.py          flags of the data            ratings_files.py   the files of a folder or zip
datasets.py        data sets by name or path    split.py           a split of the user's own
download.py        MovieLens from GroupLens     synthetic.py       generated, best metrics known
                                                random_ratings.py  the same without any structure
"""
