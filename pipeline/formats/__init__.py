"""Files of ratings -> checked Arrow tables, whatever their format.

source_file.py  plain, packed and zipped files    typed.py      columns with types -> ratings
blocks.py       text in blocks of whole records   jsonlines.py  JSON, an object a line or an array
layout.py       separator, columns of a text      parquet.py    Parquet, Arrow, ORC; data frames
text.py         CSV and other text                readers.py    files of any format, one stream
"""
