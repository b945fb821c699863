"""How many cases are drawn, and what is left out of the fast suite.

`pytest --soak 100 -m "soak or drawn"`, which is `make soak`, draws 100 new cases in each test marked `drawn` (where the
fast suite takes 20, the same each time) and also runs the tests marked `soak`. Such a test takes its number from a
profile: `@settings(settings.get_profile("drawn"))`.
"""

from hypothesis import settings


def pytest_addoption(parser):
    parser.addoption("--soak", type=int, default=0, metavar="N", help="run soak tests too, and draw N cases, new ones")


def pytest_configure(config):
    soak = config.getoption("soak")
    config.addinivalue_line("markers", "soak: takes long; runs only with --soak N")
    config.addinivalue_line("markers", "drawn: draws as many cases as --soak says, or 20")
    settings.register_profile(
        "drawn", max_examples=soak or 20, derandomize=not soak, deadline=None, print_blob=bool(soak)
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("soak"):
        slow = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
