"""A recorded run as one page: ``python -m tinker_custom_loss report runs/first -o report.html``."""

from .across import titles
from .figures import figures, standalone
from .page import report_page
from .png import png

__all__ = ["figures", "png", "report_page", "standalone", "titles"]
