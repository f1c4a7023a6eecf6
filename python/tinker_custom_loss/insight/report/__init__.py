"""A recorded run as one page: ``python -m tinker_custom_loss report runs/first -o report.html``."""

from .figures import figures, standalone
from .page import report_page

__all__ = ["figures", "report_page", "standalone"]
