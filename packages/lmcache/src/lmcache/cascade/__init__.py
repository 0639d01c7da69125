"""L1 and the tiers below it: writes chunks down (cascade), reads them back up (promote).

A client of the core like any other, in the service process: it attaches, maps the pool, and does as the core orders
(``wire/orders.py``). Reading order: ``guard.py`` (one tier, kept at arm's length), ``line.py`` (the conversation with
the core), ``writing.py``, ``promoting.py``, ``run.py``.
"""
