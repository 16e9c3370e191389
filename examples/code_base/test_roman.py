import unittest

import roman

KNOWN = {1: "I", 4: "IV", 9: "IX"}


class RomanTest(unittest.TestCase):
    def test_known(self):
        for n, text in KNOWN.items():
            self.assertEquals(roman.to_roman(n), text)

    def test_back(self):
        for n, text in KNOWN.items():
            self.assertEquals(roman.from_roman(text), n)
