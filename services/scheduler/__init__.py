"""scheduler: the calendar, and the end of sessions.

It owns schedules, fires and session deadlines; it alone says when a session must end.
"""
