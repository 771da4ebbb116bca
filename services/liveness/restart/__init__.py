"""The one door: who is declared dead, and the only caller of a driver that starts or ends anything.

Transaction 1 fences: this incarnation, believed alive, no other restart open; it writes the restart, marks the agent
and tells. Then a replica leases the restart and calls the driver, bounded, with the container that it expects.
Transaction 2 writes what came of it. A loser of the fence does nothing; no write, no restart. A restart whose lease has
ended is finished by another replica under the same fence, and so once.
"""
