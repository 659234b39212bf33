//! A grey canvas and a few soft shapes.

use jpeg_encoder::{ColorType, Encoder};

use crate::rng::Rng;

/// A place on a canvas, in pixels from its left upper corner.
pub(super) type Place = [f32; 2];

const QUALITY: u8 = 85;

/// Grey values from 0 to 255, row by row.
#[derive(Debug, Clone)]
pub(crate) struct Canvas {
    pub(super) width: u16,
    pub(super) height: u16,
    grey: Vec<f32>,
}

impl Canvas {
    /// A canvas on which each pixel has the value that `value` gives its place.
    pub(super) fn new(width: u16, height: u16, value: impl Fn(Place) -> f32) -> Self {
        let places =
            (0..height).flat_map(|y| (0..width).map(move |x| [f32::from(x), f32::from(y)]));
        Self { width, height, grey: places.map(value).collect() }
    }

    /// Its value at a place, between pixels too; None outside.
    pub(super) fn at(&self, [x, y]: Place) -> Option<f32> {
        if x < 0.0 || y < 0.0 || x > f32::from(self.width - 1) || y > f32::from(self.height - 1) {
            return None;
        }
        let (left, top) = (x as usize, y as usize);
        let (right, bottom) =
            ((left + 1).min(self.width as usize - 1), (top + 1).min(self.height as usize - 1));
        let (across, down) = (x - left as f32, y - top as f32);
        let pixel = |x: usize, y: usize| self.grey[y * self.width as usize + x];
        let above = pixel(left, top) * (1.0 - across) + pixel(right, top) * across;
        let below = pixel(left, bottom) * (1.0 - across) + pixel(right, bottom) * across;
        Some(above * (1.0 - down) + below * down)
    }

    /// Lays something over it: `paint` gives a value and how much of it there is, from 0 to 1, or
    /// nothing. Only within the box from `low` to `high`.
    pub(super) fn lay(
        &mut self,
        low: Place,
        high: Place,
        paint: impl Fn(Place) -> Option<(f32, f32)>,
    ) {
        let from = |part: f32| part.floor().max(0.0) as usize;
        let to = |part: f32, limit: u16| (part.ceil().max(0.0) as usize + 1).min(limit.into());
        for y in from(low[1])..to(high[1], self.height) {
            for x in from(low[0])..to(high[0], self.width) {
                let Some((value, part)) = paint([x as f32, y as f32]) else { continue };
                let pixel = &mut self.grey[y * self.width as usize + x];
                *pixel += (value - *pixel) * part;
            }
        }
    }

    /// An ellipse whose edge is `soft` pixels wide.
    pub(super) fn ellipse(&mut self, middle: Place, radii: Place, soft: f32, value: f32) {
        let low = [0, 1].map(|axis| middle[axis] - radii[axis] - soft);
        let high = [0, 1].map(|axis| middle[axis] + radii[axis] + soft);
        let mean = (radii[0] * radii[1]).sqrt();
        self.lay(low, high, |place| {
            let [x, y] = [0, 1].map(|axis| (place[axis] - middle[axis]) / radii[axis]);
            Some((value, inside(((x * x + y * y).sqrt() - 1.0) * mean, soft)))
        });
    }

    /// A line that is as thick at its ends as said, and round there.
    pub(super) fn line(&mut self, from: (Place, f32), to: (Place, f32), soft: f32, value: f32) {
        let ((a, thick_a), (b, thick_b)) = (from, to);
        let reach = thick_a.max(thick_b) / 2.0 + soft;
        let low = [0, 1].map(|axis| a[axis].min(b[axis]) - reach);
        let high = [0, 1].map(|axis| a[axis].max(b[axis]) + reach);
        let along = [b[0] - a[0], b[1] - a[1]];
        let squared = (along[0] * along[0] + along[1] * along[1]).max(f32::MIN_POSITIVE);
        self.lay(low, high, |[x, y]| {
            let off = [x - a[0], y - a[1]];
            let part = ((off[0] * along[0] + off[1] * along[1]) / squared).clamp(0.0, 1.0);
            let apart = [off[0] - part * along[0], off[1] - part * along[1]];
            let distance = (apart[0] * apart[0] + apart[1] * apart[1]).sqrt();
            let thick = thick_a + (thick_b - thick_a) * part;
            Some((value, inside(distance - thick / 2.0, soft)))
        });
    }

    /// A rectangle.
    pub(super) fn rectangle(&mut self, low: Place, high: Place, value: f32) {
        self.lay(low, [high[0] - 1.0, high[1] - 1.0], |_| Some((value, 1.0)));
    }

    /// Multiplies each pixel by what its place gives.
    pub(super) fn light(&mut self, light: impl Fn(Place) -> f32) {
        let width = self.width as usize;
        for (at, pixel) in self.grey.iter_mut().enumerate() {
            *pixel *= light([(at % width) as f32, (at / width) as f32]);
        }
    }

    /// What a sensor adds in poor light.
    pub(super) fn grain(&mut self, rng: &mut Rng, most: f32) {
        for pixel in &mut self.grey {
            *pixel += rng.between(-most, most);
        }
    }

    /// As a camera would send it.
    pub(super) fn jpeg(&self) -> Vec<u8> {
        let bytes: Vec<u8> = self.grey.iter().map(|grey| grey.round() as u8).collect();
        let mut out = Vec::new();
        let encoder = Encoder::new(&mut out, QUALITY);
        // It fails where a size is 0 or the writer fails: neither is possible here.
        if encoder.encode(&bytes, self.width, self.height, ColorType::Luma).is_err() {
            out.clear();
        }
        out
    }
}

/// How much of a shape there is so far outside its edge.
fn inside(distance: f32, soft: f32) -> f32 {
    let part = (0.5 - distance / soft.max(0.01)).clamp(0.0, 1.0);
    part * part * (3.0 - 2.0 * part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_where_they_should_be_and_may_reach_over_the_edge() {
        let mut canvas = Canvas::new(40, 30, |_| 100.0);
        canvas.ellipse([20.0, 15.0], [8.0, 4.0], 1.0, 200.0);
        assert_eq!(canvas.at([20.0, 15.0]), Some(200.0));
        assert_eq!(canvas.at([20.0, 22.0]), Some(100.0));
        canvas.line(([-10.0, 29.0], 4.0), ([60.0, 29.0], 4.0), 0.5, 0.0);
        assert_eq!((canvas.at([0.0, 29.0]), canvas.at([39.0, 29.0])), (Some(0.0), Some(0.0)));
        canvas.rectangle([35.0, -3.0], [90.0, 2.0], 50.0);
        assert_eq!((canvas.at([35.0, 1.0]), canvas.at([34.0, 1.0])), (Some(50.0), Some(100.0)));
        assert_eq!(canvas.at([35.0, 2.0]), Some(100.0));
        assert_eq!(canvas.at([34.5, 1.0]), Some(75.0));
        assert_eq!((canvas.at([-0.1, 0.0]), canvas.at([0.0, 29.5])), (None, None));
        canvas.light(|_| 10.0);
        assert!(!canvas.jpeg().is_empty());
    }
}
