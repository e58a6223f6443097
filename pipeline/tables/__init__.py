"""Work on text and on the columns of Arrow tables, before they become ratings.

encoding.py    UTF-8 or CP1252
values.py      ids, ratings, exact times
times.py       dates as people and programs write them -> nanoseconds
names.py       names of columns, --columns
headerless.py  columns without names, by their values
points.py      points in time that a flag gives
where.py       --where: rows by an expression in the names of columns
sequences.py   a row a user, with lists -> a row a rating
"""
