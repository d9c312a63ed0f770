"""`todi-cache`: look at, check and mend caches. One module a command, over `todi_offline.cache`; never torch."""
