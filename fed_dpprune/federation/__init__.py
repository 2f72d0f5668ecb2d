"""The round on both sides, and who carries it. The only room that imports flwr or ray.

Lives here: terms and messages, the server's loop (`strategy.py`), the client's work (`client.py`, `local_train.py`), the
simulated clients' host (`host.py`), aggregation, checkpoints, the run directory and the runners (ray, inline).
Does not live here: gradients, noise, accounting, codecs, supports; each has its room.
Read first: `strategy.py` (server side, numbered steps), then `client.py` (client side, numbered steps).
"""
