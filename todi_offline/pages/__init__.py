"""Numbers in, one HTML file out that opens by double click and asks the network for nothing. numpy, never torch.

page         blocks of a page -> HTML, or JSON; template.html, page.css and the scripts are what it fills
blocks       numbers and texts -> the blocks that the scripts can draw
texts        token ids -> texts that people can read, and that cannot do harm
choosing     a cache -> the sequences that its page shows
gate         the entries of teacher and student -> ToDi's gate and each entry's part of the divergence
tokens       sequences, and what a student makes of them -> the token view
cache_page   a cache -> its page
token_page   sequences that a student has read -> their part of a page
run_page     runs and scores -> their part of a page
"""
