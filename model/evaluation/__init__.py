"""Leave-one-out evaluation of a possibly sharded model; may import step and the rooms below it.

evaluate: ranks of the targets, on any number of ranks. catalog_scores: scores of this rank's slice
of the catalog, part by part. top_items: exact best items of users, in parts and over ranks.
metrics: HR, NDCG and MRR from ranks. report: the printed table and eval_<split>.json.
"""
