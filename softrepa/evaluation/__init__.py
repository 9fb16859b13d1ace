"""Whether tokens help, by the paper's measures: pictures of captions and edits, judged by models that others published.

The libraries of the judges are imported when one is asked for, and are no requirement of anything else.
"""
