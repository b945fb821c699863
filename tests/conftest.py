"""How many cases are drawn, and what is left out of the fast suite.

`pytest --soak 100 -m "soak or drawn"`, which is `make soak`, draws 100 new cases in each test marked `drawn` (of which
the fast suite takes 20, the same each time) and also runs the tests marked `soak`. `pytest --lab tests/lab`, which is
`make lab`, runs what needs several hosts; with `CI` in the environment nothing there may be skipped.
"""

from hypothesis import settings


def pytest_addoption(parser):
    parser.addoption("--soak", type=int, default=0, metavar="N", help="run soak tests too, and draw N cases, new ones")
    parser.addoption("--lab", action="store_true", help="run what needs several hosts, and that alone")


def pytest_configure(config):
    settings.register_profile("any machine", deadline=None)  # others may use it too
    settings.load_profile("any machine")
    config.addinivalue_line("markers", "soak: takes long; runs only with --soak N")
    config.addinivalue_line("markers", "drawn: a hypothesis test of as many cases as --soak says, or 20")
    config.addinivalue_line("markers", "lab: needs several hosts; runs only with --lab")


def pytest_collection_modifyitems(config, items):
    soak = config.getoption("soak")
    for item in items:
        if item.get_closest_marker("drawn"):
            settings(max_examples=soak or 20, derandomize=not soak, print_blob=bool(soak), deadline=None)(item.function)
    if not soak:
        slow = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    lab = config.getoption("lab")
    others = [item for item in items if bool(item.get_closest_marker("lab")) != lab]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
