"""`shodh watch`: a page that shows a run while it trains (docs/watch.md).

`state` turns the run folder into what the page draws, `forecast` makes the pictures of the newest checkpoint in a
process of its own, and `server` answers the browser.
"""
