"""Where ratings come from, as streams of Arrow tables.

config.py     flags of the data                      layout.py       separator, columns of a text
datasets.py   data sets by name, their files         blocks.py       text in blocks of whole records
download.py   MovieLens archives from GroupLens      readers.py      files -> checked tables
synthetic.py  generated data, best metrics known     parquet.py      the same of Parquet files
source_file.py  plain, gzipped and zipped files      values.py       ids, ratings, exact times
"""
