//! Who is near whom: a grid over the unit cube whose cells are as wide as a particle reaches.

/// Particles by cell.
#[derive(Debug, Clone)]
pub(crate) struct Cells {
    /// Cells along each edge.
    side: usize,
    /// Where each cell's particles begin in `members`; one entry more than there are cells.
    starts: Vec<u32>,
    /// Particles, cell by cell.
    members: Vec<u32>,
}

impl Cells {
    /// A grid for particles that see `reach` far.
    pub(crate) fn new(reach: f32) -> Self {
        let side = ((1.0 / reach) as usize).max(1);
        Self { side, starts: vec![0; side.pow(3) + 1], members: Vec::new() }
    }

    /// Sorts the particles into cells. Within a cell they keep their order, so that sums over
    /// neighbours are the same wherever they are computed.
    pub(crate) fn sort(&mut self, places: &[[f32; 3]]) {
        self.starts.fill(0);
        for place in places {
            let cell = self.cell_of(*place);
            self.starts[cell + 1] += 1;
        }
        for cell in 1..self.starts.len() {
            self.starts[cell] += self.starts[cell - 1];
        }
        self.members.resize(places.len(), 0);
        let mut next = self.starts.clone();
        for (particle, place) in places.iter().enumerate() {
            let cell = self.cell_of(*place);
            self.members[next[cell] as usize] = particle as u32;
            next[cell] += 1;
        }
    }

    /// Calls `each` with every particle that may be within reach of a place.
    pub(crate) fn near(&self, place: [f32; 3], mut each: impl FnMut(usize)) {
        let [x, y, z] = place.map(|part| self.coordinate(part));
        let around = |at: usize| at.saturating_sub(1)..=(at + 1).min(self.side - 1);
        for x in around(x) {
            for y in around(y) {
                let row = (x * self.side + y) * self.side;
                let zs = around(z);
                // Cells of a row lie side by side, and so do their particles.
                let from = self.starts[row + zs.start()] as usize;
                let to = self.starts[row + zs.end() + 1] as usize;
                for member in &self.members[from..to] {
                    each(*member as usize);
                }
            }
        }
    }

    fn coordinate(&self, part: f32) -> usize {
        // A float below 0, or none at all, becomes 0.
        ((part * self.side as f32) as usize).min(self.side - 1)
    }

    fn cell_of(&self, place: [f32; 3]) -> usize {
        let [x, y, z] = place.map(|part| self.coordinate(part));
        (x * self.side + y) * self.side + z
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn nobody_within_reach_is_missed_and_nobody_is_met_twice() {
        let (reach, mut rng) = (0.13, Rng::of(&[3]));
        let mut places: Vec<[f32; 3]> =
            (0..400).map(|_| std::array::from_fn(|_| rng.unit())).collect();
        places.extend([[0.0; 3], [1.0; 3], [1.0, 0.0, 1.0], [-0.1, 2.0, f32::NAN]]);
        let mut cells = Cells::new(reach);
        cells.sort(&places);
        for place in &places[..402] {
            let mut met = vec![0; places.len()];
            cells.near(*place, |other| met[other] += 1);
            for (other, met) in places.iter().zip(&met) {
                let distance: f32 =
                    (0..3).map(|axis| (place[axis] - other[axis]).powi(2)).sum::<f32>().sqrt();
                assert!(*met <= 1 && (*met == 1 || distance.is_nan() || distance > reach));
            }
        }
    }
}
