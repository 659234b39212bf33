//! The framed protocol, from the client's side.

use super::{
    application::{Heard, Problem, Talk},
    wire::Wire,
};
use crate::{
    frame::{Frame, Kind, Reader},
    inputs::Inputs,
};

/// A conversation in frames.
pub(super) struct Framed<I> {
    inputs: I,
    reader: Reader,
}

impl<I: Inputs> Framed<I> {
    pub(super) fn new(inputs: I) -> Self {
        Self { inputs, reader: Reader::default() }
    }

    fn judge(&self, frame: &Frame) -> Heard {
        let judged = match frame.kind {
            Kind::Answer => self.inputs.judge(frame.seq, &frame.payload),
            Kind::Failure => Err(String::from_utf8_lossy(&frame.payload).into_owned()),
            Kind::Request => Err("a request came where an answer should".to_owned()),
        };
        Heard { seq: frame.seq, bytes: frame.payload.len() as u64, judged }
    }
}

impl<I: Inputs> Talk for Framed<I> {
    fn connected(&mut self, _: &mut Wire) {
        self.reader = Reader::default();
    }

    fn ask(&mut self, seq: u64, now_ns: i64, wire: &mut Wire) -> Result<u64, Problem> {
        let payload = self.inputs.request(seq).map_err(Problem)?;
        let frame = Frame { kind: Kind::Request, seq, sent_ns: now_ns, payload };
        let bytes = frame.encode().map_err(|error| Problem(error.to_string()))?;
        wire.queue(&bytes);
        Ok(bytes.len() as u64)
    }

    fn hear(&mut self, bytes: &[u8], _: i64, _: &mut Wire) -> Result<Vec<Heard>, Problem> {
        self.reader.push(bytes);
        let mut heard = Vec::new();
        loop {
            match self.reader.next_frame() {
                Ok(Some(frame)) => heard.push(self.judge(&frame)),
                Ok(None) => return Ok(heard),
                Err(error) => return Err(Problem(error.to_string())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        client::application::Judged,
        fluid::{Picture, Water},
        inputs::{Readings, readings::reading},
    };

    fn frame(kind: Kind, seq: u64, payload: Vec<u8>) -> Vec<u8> {
        Frame { kind, seq, sent_ns: 9, payload }.encode().unwrap()
    }

    #[test]
    fn answers_failures_and_nonsense_are_told_apart() {
        let mut talk = Framed::new(Readings { seed: 1 });
        let mut wire = Wire::default();
        let size = talk.ask(4, 9, &mut wire).unwrap();
        assert_eq!((size, wire.take().len()), (33, 33));
        let picture: Picture = Water::default().frame(reading(1, 4));
        let good = frame(Kind::Answer, 4, picture.encode());
        let said = [
            good,
            frame(Kind::Answer, 5, b"?".to_vec()),
            frame(Kind::Failure, 6, b"no camera".to_vec()),
            frame(Kind::Request, 7, Vec::new()),
        ];
        let heard = talk.hear(&said.concat(), 9, &mut wire).unwrap();
        let mark = format!("1:{}", hex::encode(picture.digest));
        assert_eq!(heard[0].judged, Ok(Judged { right: None, mark: Some(mark) }));
        assert!(heard[1].judged.as_ref().unwrap_err().contains("a picture of 1 bytes"));
        assert_eq!(heard[2].judged, Err("no camera".to_owned()));
        assert!(heard[3].judged.is_err());
        assert!(talk.hear(&[0xff; 8], 9, &mut wire).is_err());
        talk.connected(&mut wire);
        assert_eq!(talk.hear(&[0, 0], 9, &mut wire), Ok(Vec::new()));
    }
}
