"""What a user of Lightning sees, which must be the same with `DDPStrategy` and with ours; named after Lightning's tests."""
