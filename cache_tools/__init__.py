"""`todi-cache`: look at, check and repair caches. One module a command, over `todi_offline.cache`; never torch."""
