"""queue: keeps and orders messages.

It owns `a2a_queue` and every delivery: nobody else keeps a message, and nobody else hands one over.
"""
