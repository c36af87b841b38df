"""A trained model as an HTTP service: ``shodh serve`` (docs/serving.md, extra ``serve``).

`server` starts it, `app` has its addresses, `bodies` reads and writes flows, `batching` computes forecasts of several
requests at a time, and ``page.html`` is what a browser shows.
"""
