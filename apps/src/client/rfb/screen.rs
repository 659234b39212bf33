//! The screen as the viewer has it.

use super::{
    Problem,
    message::{Area, Content, PIXEL_BYTES},
};

/// Pixels, row by row.
#[derive(Debug)]
pub(super) struct Screen {
    pub(super) width: u16,
    pub(super) height: u16,
    pixels: Vec<u8>,
}

impl Screen {
    pub(super) fn new(width: u16, height: u16) -> Self {
        let pixels = vec![0; usize::from(width) * usize::from(height) * PIXEL_BYTES];
        Self { width, height, pixels }
    }

    /// Puts new content in place; tells whether any pixel is another one now.
    pub(super) fn apply(&mut self, area: Area, content: &Content) -> Result<bool, Problem> {
        let fits = |area: &Area| {
            area.columns().end <= self.width.into() && area.rows().end <= self.height.into()
        };
        let outside = |area: Area| {
            Problem(format!("{area:?} is not on a screen of {}×{}", self.width, self.height))
        };
        if !fits(&area) {
            return Err(outside(area));
        }
        let bytes = usize::from(area.width) * PIXEL_BYTES;
        let new = match content {
            Content::Raw(pixels) => pixels.clone(),
            Content::Copy { x, y } => {
                let from = Area { x: *x, y: *y, ..area };
                if !fits(&from) {
                    return Err(outside(from));
                }
                // All of it before any is overwritten: both may overlap.
                let rows = from.rows().map(|row| self.row(row, *x, bytes));
                rows.flatten().copied().collect()
            }
        };
        let mut changed = false;
        for (row, new) in area.rows().zip(new.chunks(bytes.max(1))) {
            let start = self.start(row, area.x);
            if let Some(old) = self.pixels.get_mut(start..start + new.len())
                && old != new
            {
                old.copy_from_slice(new);
                changed = true;
            }
        }
        Ok(changed)
    }

    fn start(&self, row: usize, column: u16) -> usize {
        (row * usize::from(self.width) + usize::from(column)) * PIXEL_BYTES
    }

    fn row(&self, row: usize, column: u16, bytes: usize) -> &[u8] {
        let start = self.start(row, column);
        self.pixels.get(start..start + bytes).unwrap_or_default()
    }

    /// A digest of all that is to be seen.
    pub(super) fn digest(&self) -> String {
        hex::encode(&blake3::hash(&self.pixels).as_bytes()[..8])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_from_the_same_again_and_copies_may_overlap() {
        let mut screen = Screen::new(4, 2);
        let line: Vec<u8> = (0..16).collect();
        let top = Area { x: 0, y: 0, width: 4, height: 1 };
        assert_eq!(screen.apply(top, &Content::Raw(line.clone())), Ok(true));
        let digest = screen.digest();
        assert_eq!(screen.apply(top, &Content::Raw(line.clone())), Ok(false));
        assert_eq!(screen.digest(), digest);
        let right = Area { x: 1, y: 0, width: 3, height: 1 };
        assert_eq!(screen.apply(right, &Content::Copy { x: 0, y: 0 }), Ok(true));
        assert_eq!(screen.pixels[..16], [&line[..4], &line[..12]].concat());
        for (area, content) in [
            (Area { x: 1, ..top }, Content::Raw(line)),
            (right, Content::Copy { x: 2, y: 0 }),
            (top, Content::Copy { x: 0, y: 2 }),
        ] {
            assert!(screen.apply(area, &content).is_err(), "{area:?} {content:?}");
        }
    }
}
