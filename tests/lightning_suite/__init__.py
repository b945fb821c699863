"""What a user of Lightning sees: the same with `DDPStrategy` and with ours. Named after Lightning's own tests."""

import pytest

pytest.register_assert_rewrite("tests.lightning_suite.compare")  # so that a failed comparison shows what differs
