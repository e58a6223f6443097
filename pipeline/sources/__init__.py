"""Where ratings come from: files, downloads and generators, as streams of Arrow tables.

    datasets.py      data sets by name; finds the files of a data set
    download.py      MovieLens archives from GroupLens
    source_file.py   plain, gzipped and zipped files
    layout.py        separator and columns of a text file
    readers.py       text and Parquet files -> tables
    ratings.py       types and checks of the tables' columns
    synthetic.py     generated ratings with known best metrics

May import the files of pipeline/.
"""
