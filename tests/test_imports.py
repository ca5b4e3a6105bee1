"""How modules of the package import each other."""

from __future__ import annotations

from scripts import house


def test_no_circle_of_imports_is_large() -> None:
    """Imports in functions count: nobody can read a part of what they tie together."""
    modules = house.read_package(house.PACKAGE)
    circle = house.largest_import_circle(modules)
    names = {module.name for module in modules}
    edges = [
        f"{module.name} -> {other}"
        for module in modules
        if module.name in circle
        for other in sorted(house.imported_modules(module, names) & set(circle))
    ]
    assert len(circle) <= house.MAX_CIRCLE, "\n".join(edges)
