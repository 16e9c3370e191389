import os
import unittest

from files import make_file


class FileTest(unittest.TestCase):
    def test_size(self):
        path = make_file(10)
        self.assertEquals(os.path.getsize(path), 10)
        path = make_file(0)
        self.assertEquals(os.path.getsize(path), 0)

    def test_name(self):
        self.assertTrue(make_file(1).endswith(".bin"))
