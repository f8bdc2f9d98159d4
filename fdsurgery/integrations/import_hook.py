"""Does something as soon as another library's module is imported: see `fdconv.import_hook`."""

from fdconv.import_hook import on_import

__all__ = ["on_import"]
