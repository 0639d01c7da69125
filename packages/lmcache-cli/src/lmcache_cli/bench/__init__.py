"""Measuring a serving engine under load.

Reading order: ``base`` (the words) -> ``workloads/`` (what is sent; one file a workload) -> ``stream`` (one request,
measured) -> ``load`` (when requests are sent) -> ``run`` (one run from plan to result) -> ``summary`` (numbers) ->
``report`` and ``page`` (what people read) -> ``rundir`` (files) -> ``compare``, ``sweep`` (several runs). Knows nothing
of the terminal: what is shown while it runs goes through ``base.Observer``.
"""
