"""`make demo`: the stories that Bide was built for, replayed in front of you on a real stack."""
