"""The report of ``bench/gpu_report.sh``: what is measured on a GPU, how, and what is made of it.

``run.py`` goes through the parts; ``measure.py`` holds the measurements and ``cases.py`` what they are of.
"""
