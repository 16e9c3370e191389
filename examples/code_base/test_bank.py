import unittest

from bank import Account


class AccountTest(unittest.TestCase):
    """Deposits and balances."""

    def test_opening(self):
        account = Account()
        self.assertEquals(account.balance, 0)
        self.assertFalse(account.closed)

    def test_deposit(self):
        account = Account()
        account.deposit(10)
        self.assertEquals(account.balance, 10)
        account.deposit(5)
        self.assertEquals(account.balance, 15)
