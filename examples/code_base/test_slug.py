import unittest

from slug import slugify


class SlugTest(unittest.TestCase):
    """Tests of the slugs."""

    def test_spaces(self):
        self.assertEquals(slugify("a b"), "a-b")
        self.assertEquals(slugify(" a "), "a")

    def test_case(self):
        self.assertTrue(slugify("A").islower())
        self.assertEquals(slugify("A"), "a")
