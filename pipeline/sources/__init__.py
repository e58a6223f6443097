"""Where ratings come from, as streams of Arrow tables.

config.py     flags of the data                      layout.py       separator, columns of a text
datasets.py   data sets by name, their files         blocks.py       text in blocks of whole records
download.py   MovieLens archives from GroupLens      readers.py      files -> checked tables
synthetic.py  generated data, best metrics known     parquet.py      the same of Parquet, Arrow, ORC
source_file.py  plain, packed and zipped files       text.py         the same of CSV and other text
typed.py      columns with types -> ratings          jsonlines.py    the same of JSON
"""
