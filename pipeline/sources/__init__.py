"""Where ratings come from, as streams of Arrow tables.

config.py     flags of the data                        layout.py     separator, columns of a text
datasets.py   data sets by name, their files           readers.py    text, Parquet -> tables
download.py   MovieLens archives from GroupLens        ratings.py    types and checks of columns
synthetic.py  generated data, best metrics known       source_file.py   plain, gzipped and zipped
"""
