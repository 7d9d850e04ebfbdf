//! Dates as Python's `strftime` writes them, in UTC.

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `seconds` since 1970 by `format`; the specifier that is not known is the error.
pub(super) fn format(seconds: u64, format: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(character) = chars.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut specifier = chars.next().ok_or_else(String::new)?;
        let padded = specifier != '-';
        if !padded {
            specifier = chars.next().ok_or_else(|| "-".to_owned())?;
        }
        let field = field(seconds, specifier).ok_or_else(|| specifier.to_string())?;
        out.push_str(if padded { &field } else { field.trim_start_matches('0') });
        if !padded && field.bytes().all(|digit| digit == b'0') {
            out.push('0');
        }
    }
    Ok(out)
}

fn field(seconds: u64, specifier: char) -> Option<String> {
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let date = Date::from_days(days);
    let (month_name, day_name) = (MONTHS[date.month as usize - 1], DAYS[(days % 7) as usize]);
    Some(match specifier {
        'Y' => date.year.to_string(),
        'y' => format!("{:02}", date.year % 100),
        'm' => format!("{:02}", date.month),
        'd' => format!("{:02}", date.day),
        'B' => month_name.to_owned(),
        'b' | 'h' => month_name[..3].to_owned(),
        'A' => day_name.to_owned(),
        'a' => day_name[..3].to_owned(),
        'H' => format!("{hour:02}"),
        'I' => format!("{:02}", (hour + 11) % 12 + 1),
        'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
        'M' => format!("{minute:02}"),
        'S' => format!("{second:02}"),
        'F' => format!("{}-{:02}-{:02}", date.year, date.month, date.day),
        'T' => format!("{hour:02}:{minute:02}:{second:02}"),
        'Z' => "UTC".to_owned(),
        'z' => "+0000".to_owned(),
        '%' => "%".to_owned(),
        _ => return None,
    })
}

struct Date {
    year: u64,
    month: u64,
    day: u64,
}

impl Date {
    /// The civil date `days` after 1970-01-01: Howard Hinnant's `civil_from_days`, for days from 1970 on.
    fn from_days(days: u64) -> Self {
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        Self { year: year_of_era + era * 400 + u64::from(month <= 2), month, day }
    }
}

#[cfg(test)]
mod tests {
    use super::format;

    #[test]
    fn dates_equal_those_of_python() {
        // datetime.fromtimestamp(s, timezone.utc).strftime(...)
        assert_eq!(format(0, "%A %d %b %Y").unwrap(), "Thursday 01 Jan 1970");
        assert_eq!(format(951_782_400, "%d %B %y, %a").unwrap(), "29 February 00, Tue");
        assert_eq!(format(1_735_689_599, "%F %T %I%p").unwrap(), "2024-12-31 23:59:59 11PM");
        assert_eq!(format(1_741_219_200, "%-d/%-m %H:%M:%S %%").unwrap(), "6/3 00:00:00 %");
        assert_eq!(format(0, "%-H").unwrap(), "0");
        assert_eq!(format(0, "%Q").unwrap_err(), "Q");
        assert_eq!(format(0, "%").unwrap_err(), "");
    }
}
