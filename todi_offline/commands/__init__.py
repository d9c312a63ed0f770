"""What a person types in, what is done and printed out.

cli        `todi`
options    configs -> options of commands; headings, under which help lists them
terminal   summaries and progress -> lines and bars
demo       the whole job on a real teacher
"""
