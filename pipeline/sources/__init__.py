"""Where ratings come from, as streams of Arrow tables.

config.py     flags of the data                      layout.py       separator, columns of a text
datasets.py   data sets by name, their files         readers.py      text, Parquet -> checked tables
download.py   MovieLens archives from GroupLens      source_file.py  plain, gzipped and zipped
synthetic.py  generated data, best metrics known
"""
