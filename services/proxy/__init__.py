"""proxy: the only door: HTTP in, HTTP out.

It owns the registry (who exists, where, which token, which settings, which incarnation), passes idle traffic through,
and makes no promise that the broker has not confirmed.
"""
