import unittest

from geometry import Point


class PointTests(unittest.TestCase):
    def test_sum(self):
        s = Point(1, 2) + Point(3, 4)
        self.assertEquals(s.x, 4)
        self.assertEquals(s.y, 6)

    def test_origin(self):
        self.assertIsNotNone(Point.origin())
        self.assertEquals(Point.origin().x, 0)
