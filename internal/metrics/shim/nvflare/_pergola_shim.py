"""Marks this package as the one of `pergola shim nvflare`. Flower takes only Python files of an app along, so the mark is one."""
