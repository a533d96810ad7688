"""What is measured, and how: `record` says where results go, `cases` what is compared with what; the folders say which quantity.

May import distill_kernels, never tests.
"""
