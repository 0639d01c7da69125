"""`lmcache server`: the core (wire and cache, one loop) and the service process (HTTP, metrics).

Reading order: command -> run -> assembly -> core -> dispatch, sessions; report, growth, addresses; supervisor ->
service -> http, link, exposition.
"""
