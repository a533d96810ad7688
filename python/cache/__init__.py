"""Offline teachers: a teacher's outputs over a data set, written once and read in every epoch instead of running the teacher.

    layout        what a cache's folder holds; its index; how large it will be
    token_rows    the data set: rows of token ids, and their hashes
    teacher_pass  what is kept of a teacher's run over a few rows
    int8_rows     hidden states in 8 bits and back
    whole_files   files that are there whole or not at all, and the lock of who writes them
    writing       write_teacher_cache
    mapped_shards its shards, checked, opened and read row by row
    reading       TeacherCache

It imports `call`, `estimators`, `losses`, `models`, `products` and `user_error`.
"""
