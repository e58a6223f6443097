"""From a trained model to recommendations.

config: flags of recommend.py. eligible: the items that may be recommended. recommender: the model,
its catalog, and what it recommends. rows: rows of a table from lists. output: files of rows, by
extension. shown: a list as text. answer: what recommend.py does with its flags.

May import run and the rooms below it.
"""
