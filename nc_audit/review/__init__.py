"""Review: people decide about pairs in a local web page; what they decide is kept for good and wins over tags.

`Review` is one review in progress, `ReviewServer` shows it in a browser, `review_facts` says who decided what and what
a random sample tells about the tags, `export_decisions` and `import_decisions` exchange decisions with files.
"""

from __future__ import annotations

from nc_audit.review.audit import figures_json, statement
from nc_audit.review.exchange import export_decisions, import_decisions
from nc_audit.review.journal import Journal
from nc_audit.review.server import ReviewServer
from nc_audit.review.session import Review, review_facts

__all__ = [
    "Journal",
    "Review",
    "ReviewServer",
    "export_decisions",
    "figures_json",
    "import_decisions",
    "review_facts",
    "statement",
]
