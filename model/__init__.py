"""BERT4Rec on TorchRec: everything that needs torch."""

import logging

# FBGEMM 1.6 logs at every import that it does not list the torch versions that it works with.
logging.getLogger().addFilter(
    lambda record: "_fbgemm_torch_compat_table has no entry" not in record.getMessage()
)
